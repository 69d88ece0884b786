"""What quantization did to a model and its images: one HTML page, and a picture of a segment plan."""

try:
    from .page import write_report
    from .plan_drawing import draw_plan
except ImportError as error:
    raise ImportError("reports need matplotlib, Pillow and Jinja2: pip install 'optimum-segquant[eval]'") from error

__all__ = ["draw_plan", "write_report"]
