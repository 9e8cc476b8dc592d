"""The adapter store: durable truth about adapters. Blobs on disk by digest, metadata in a registry."""
