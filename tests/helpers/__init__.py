"""What tests share: references, cases, ranks, stand-ins. No test imports another test."""
