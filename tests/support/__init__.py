"""What tests of fidelity share: programs as text, the state they can see, and a comparison with eager."""
