"""The embedded models: a small OLMoE and a small Qwen-MoE, and all that makes them (corpus, recipes, training)."""
