"""What compares methods and draws pictures."""
