"""Durable files: written completely or not at all."""
