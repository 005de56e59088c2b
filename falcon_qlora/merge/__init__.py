"""An adapter merged into its base model, with proof of what that did to it."""
