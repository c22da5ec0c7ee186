"""Recipes: YAML with locations, the schema of each section, validation."""
