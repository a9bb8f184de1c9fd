"""Recipes: how a model is quantized."""
