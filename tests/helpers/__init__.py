"""What tests share: pairs to test on, draws that are recorded, and truths written out by hand."""
