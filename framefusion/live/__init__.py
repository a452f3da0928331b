"""The live model: reduction by hooks inside an unmodified Hugging Face model. Needs torch; knows no bundle."""
