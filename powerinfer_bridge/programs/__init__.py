"""Real programs that run models: PowerInfer's, llama.cpp's, and what they print."""
