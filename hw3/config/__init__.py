"""Recipes: YAML with line numbers, the schema of each section, validation."""
