"""Draw, edit and describe: the one place where a trained model is used."""
