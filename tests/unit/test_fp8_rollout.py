"""Block FP8 for servers: which weights, what files, what SGLang would refuse, and running servers that hold the wrong kind."""
