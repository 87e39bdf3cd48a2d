"""Measures a model: reconstruction, drawing, editing and questions, each with a 95 % interval."""
