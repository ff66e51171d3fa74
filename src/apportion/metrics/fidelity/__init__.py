"""Whether a map predicts what the model does when the input is changed, and whether like inputs get like maps."""
