"""The page for people, at "/" of the server: another client of the same worker, made by Gradio."""
