"""The tools of Themis.  https://huggingface.co/papers/2310.01045"""
