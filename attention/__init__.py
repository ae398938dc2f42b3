"""Attention classes, one per file; variants.ATTENTIONS names them."""
