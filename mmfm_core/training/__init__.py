"""What happens inside one site: local steps and evaluation."""
