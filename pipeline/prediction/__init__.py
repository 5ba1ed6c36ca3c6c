"""Prediction on images and videos."""
