"""The accuracy of a model on a file of questions: what answers, what is right, and how sure that is."""
