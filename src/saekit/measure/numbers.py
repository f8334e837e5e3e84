"""Numbers as text: the digits that the terminal, a notebook and the page show alike.

The page's script has a copy (``decimals`` and ``percent`` in ``report/templates/browser.js``); a test compares them.
"""

from __future__ import annotations


def decimals(value: float) -> str:
    """Format a finite number with three significant digits, thousands separated.

    >>> [decimals(value) for value in (0.123456, 12345.6, 999.7, 0.0, 16.0, -0.5, 0.000012345)]
    ['0.123', '12,346', '1,000', '0', '16', '-0.5', '1.23e-05']
    """
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def percent(fraction: float) -> str:
    """Format a fraction in percent, with the digits of `decimals`.

    >>> percent(0.09657), percent(0.95), percent(1), percent(0.0000123)
    ('9.66%', '95%', '100%', '0.00123%')
    """
    return f"{decimals(100 * fraction)}%"
