"""One checkpoint format for every layout: safetensors, JSON and a manifest of checksums, without pickle."""
