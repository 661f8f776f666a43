"""Images of identities: read, paired, aligned, augmented."""
