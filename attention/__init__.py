"""Attention classes, one a file; variants.ATTENTIONS names them."""
