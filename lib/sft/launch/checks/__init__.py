"""What the doctor looks at, by concern: inputs, training, cluster."""
