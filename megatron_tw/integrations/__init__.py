"""The method inside other training stacks. Each folder is imported only by who uses that stack."""
