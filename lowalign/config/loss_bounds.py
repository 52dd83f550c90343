"""What --data.max-loss and --data.min-loss mean: nats per token, or with % a quantile."""

import math

from lowalign.errors import UserError


def read_bound(text: str, flag: str) -> tuple[float, bool]:
    """-> (number, whether it is a quantile, then from 0 to 1). Raises UserError."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    is_quantile = text.endswith("%")
    if not math.isfinite(number) or (is_quantile and not 0 <= number <= 100):
        raise UserError(
            f"{flag} is {text}; it must be nats per token, such as 2.5, or a quantile of the losses, such as 95%"
        )
    return (number / 100 if is_quantile else number), is_quantile
