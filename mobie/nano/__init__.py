"""The embedded model: a small OLMoE trained by a recipe of this repository (corpus, tokenizer, training)."""
