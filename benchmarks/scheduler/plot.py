"""The growth of the scheduler's work with the queue, as a small SVG."""

import math

WIDTH, HEIGHT, MARGIN = 480, 300, 56


def growth_plot(points: list[tuple[int, float]], commit: str) -> str:
    """`points` are (requests, processor seconds to queue and place them); beside them n log n from the first one."""
    first, seconds = points[0]
    scale = seconds / (first * math.log(first))
    reference = [(n, scale * n * math.log(n)) for n, _ in points]
    xs = [math.log10(n) for n, _ in points]
    ys = [math.log10(value) for _, value in (*points, *reference)]

    def at(n: float, value: float) -> tuple[float, float]:
        x = MARGIN + (math.log10(n) - min(xs)) / (max(xs) - min(xs)) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (math.log10(value) - min(ys)) / (max(ys) - min(ys)) * (HEIGHT - 2 * MARGIN)
        return round(x, 1), round(y, 1)

    def line(pairs: list[tuple[int, float]], colour: str, dash: str) -> str:
        path = " ".join(f"{x},{y}" for x, y in (at(*pair) for pair in pairs))
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'

    marks = []
    for n, value in points:
        x, y = at(n, value)
        marks.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="#1f6feb"/>')
        marks.append(f'<text x="{x}" y="{y - 8}" text-anchor="middle">{value:.2f} s</text>')
        marks.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{n:,}</text>')
    title = f"Processor seconds to queue n requests of n adapters over 64 workers ({commit}); dashed: n log n"
    body = [line(reference, "#888", "5 4"), line(points, "#1f6feb", "none"), *marks]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        f'<text x="{WIDTH / 2}" y="20" text-anchor="middle">{title}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )
