"""From images of identities to an exported network: what the commands in examples/ are made of. See README.md."""
