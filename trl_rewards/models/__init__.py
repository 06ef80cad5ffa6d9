"""Rewards that are models: loading them and running them within memory."""
