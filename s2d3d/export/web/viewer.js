// Draws a cloud on a canvas, z up. Drag or arrow keys turn it; + and -, or the wheel once it has the focus, zoom.
const RAMP = [[72, 36, 117], [62, 74, 137], [45, 112, 142], [33, 145, 140], [53, 183, 121], [134, 213, 73], [200, 224, 32]];

function heightColor(level) {
  const place = Math.min(RAMP.length - 1.001, Math.max(0, level * (RAMP.length - 1))), low = Math.floor(place);
  return RAMP[low].map((value, i) => value + (place - low) * (RAMP[low + 1][i] - value));
}

class CloudView {
  // points: x, y, z of one point after the other. The first `grey` points, if given, are grey and the others blue,
  // instead of colours by height.
  constructor(canvas, points, grey = null) {
    this.canvas = canvas;
    this.points = points;
    this.azimuth = -Math.PI / 3;
    this.elevation = Math.PI / 9;
    this.zoom = 1;
    this.radius = 1e-6;
    let low = Infinity, high = -Infinity;
    for (let i = 0; i < points.length; i += 3) {
      this.radius = Math.max(this.radius, Math.hypot(points[i], points[i + 1], points[i + 2]));
      low = Math.min(low, points[i + 2]);
      high = Math.max(high, points[i + 2]);
    }
    this.heights = Array.from({length: points.length / 3}, (_, i) => grey === null
      ? heightColor((points[3 * i + 2] - low) / (high - low || 1)) : i < grey ? [184, 189, 196] : [0, 114, 178]);
    this.colors = this.heights;
    canvas.width = canvas.height = 380;
    canvas.tabIndex = 0;
    canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); this.last = event; };
    canvas.onpointerup = canvas.onpointercancel = () => { this.last = null; };
    canvas.onpointermove = event => {
      if (this.last) this.turn(event.clientX - this.last.clientX, event.clientY - this.last.clientY);
      if (this.last) this.last = event;
    };
    canvas.addEventListener("wheel", event => {
      if (document.activeElement !== canvas) return;
      event.preventDefault();
      this.scale(Math.exp(-event.deltaY / 500));
    }, {passive: false});
    canvas.onkeydown = event => {
      const steps = {ArrowLeft: [-20, 0], ArrowRight: [20, 0], ArrowUp: [0, -20], ArrowDown: [0, 20]}[event.key];
      const factor = {"+": 1.2, "-": 1 / 1.2}[event.key];
      if (steps) this.turn(...steps);
      if (factor) this.scale(factor);
      if (steps || factor) event.preventDefault();
    };
    this.draw();
  }

  turn(x, y) {
    this.touched = true;
    this.azimuth -= x / 120;
    this.elevation = Math.min(Math.PI / 2, Math.max(-Math.PI / 2, this.elevation + y / 120));
    this.draw();
  }

  scale(factor) {
    this.zoom = Math.min(8, Math.max(0.3, this.zoom * factor));
    this.draw();
  }

  // RGB of each point, each in [0, 255]; null: by height
  color(colors) {
    this.colors = colors || this.heights;
    this.draw();
  }

  draw() {
    const context = this.canvas.getContext("2d"), size = this.canvas.width, distance = 4 * this.radius;
    const [ca, sa] = [Math.cos(this.azimuth), Math.sin(this.azimuth)];
    const [ce, se] = [Math.cos(this.elevation), Math.sin(this.elevation)];
    const focal = 0.46 * size * this.zoom * Math.sqrt(15);  // a sphere of this radius, seen from 4 radii, just fits
    const seen = this.colors.map((color, i) => {
      const x = this.points[3 * i], y = this.points[3 * i + 1], z = this.points[3 * i + 2];
      return {right: ca * y - sa * x, up: ce * z - se * (ca * x + sa * y), near: ce * (ca * x + sa * y) + se * z, color};
    }).sort((a, b) => a.near - b.near);
    context.clearRect(0, 0, size, size);
    const ball = 2.1 * Math.pow(512 / Math.max(64, seen.length), 0.4) * size / 190;
    for (const {right, up, near, color} of seen) {
      const depth = distance - near, fade = 0.4 * Math.min(1, Math.max(0, (1 - near / this.radius) / 2));
      context.fillStyle = `rgb(${color.map(value => Math.round(value + fade * (246 - value))).join(",")})`;
      context.beginPath();
      const x = size / 2 + focal * right / depth, y = size / 2 - focal * up / depth;
      context.arc(x, y, ball * this.zoom ** 0.5 * distance / depth, 0, 2 * Math.PI);
      context.fill();
    }
  }
}

export {CloudView};
