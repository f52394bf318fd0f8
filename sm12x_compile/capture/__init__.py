"""What happens before Dynamo traces."""
