"""Conversations over one engine: who has which of its sequences, and what one request makes of them."""
