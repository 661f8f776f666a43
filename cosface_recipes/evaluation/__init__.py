"""Verification and identification of identities that were not trained on."""
