"""Worker processes: one a replica. The only layer that imports an engine (llama_cpp, torch, sentence_transformers)."""
