"""Text-to-image bases: the parts of a pipeline of diffusers as one model, which methods adapt like any other."""
