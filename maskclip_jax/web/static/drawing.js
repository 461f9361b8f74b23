// The masks on the photo, drawn as visualize.overlay does (a test holds the two together), so that the opacity and the
// region under the pointer follow without asking the server.

const SMALLEST = 512; // smaller photos are enlarged by a whole factor, as in visualize.overlay_with_legend

async function bitmap(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error((await response.json()).error);
  // The numbers in the file are wanted, not their colours on this screen.
  return createImageBitmap(await response.blob(), {colorSpaceConversion: "none", premultiplyAlpha: "none"});
}

function pixelsOf(image, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// Pixels at most `reach` pixels (along a row or a column) from another label.
function nearEdge(labels, width, height, reach) {
  const near = new Uint8Array(width * height);
  for (let step = 1; step <= reach; step++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const here = y * width + x;
        if (x + step < width && labels[here] !== labels[here + step]) near[here] = near[here + step] = 1;
        if (y + step < height && labels[here] !== labels[here + step * width]) near[here] = near[here + step * width] = 1;
      }
    }
  }
  return near;
}

export class Drawing {
  // `photo` and `maps` are addresses: the picture, and red + 256 green = class, blue = 255 × its probability.
  static async load(photo, maps) {
    const [picture, numbers] = await Promise.all([bitmap(photo), bitmap(maps)]);
    return new Drawing(picture, numbers);
  }

  constructor(picture, numbers) {
    const {width, height} = numbers;
    const data = pixelsOf(numbers, width, height).data;
    const factor = Math.max(1, Math.floor(SMALLEST / Math.max(width, height)));
    this.factor = factor;
    this.small = {width, height, data};
    this.width = width * factor;
    this.height = height * factor;
    this.photo = pixelsOf(picture, this.width, this.height);
    this.labels = new Uint16Array(this.width * this.height);
    for (let y = 0; y < this.height; y++) {
      for (let x = 0; x < this.width; x++) {
        const at = 4 * (Math.floor(y / factor) * width + Math.floor(x / factor));
        this.labels[y * this.width + x] = data[at] + 256 * data[at + 1];
      }
    }
    const border = Math.max(1, Math.round(Math.max(this.width, this.height) / 700));
    this.line = nearEdge(this.labels, this.width, this.height, border);
    this.rim = nearEdge(this.labels, this.width, this.height, 2 * border);
    const share = this.line.reduce((sum, value) => sum + value, 0) / this.line.length;
    if (share >= 0.5) { // confetti would be all border
      this.line.fill(0);
      this.rim.fill(0);
    }
  }

  // What lies at a place, in shares of width and height.
  at(x, y) {
    const {width, height, data} = this.small;
    const column = Math.min(width - 1, Math.max(0, Math.floor(x * width)));
    const row = Math.min(height - 1, Math.max(0, Math.floor(y * height)));
    const from = 4 * (row * width + column);
    return {label: data[from] + 256 * data[from + 1], probability: data[from + 2] / 255};
  }

  // `colours`: [r, g, b] of each class; `only`: the class to single out, or null.
  draw(canvas, colours, opacity, only = null) {
    canvas.width = this.width;
    canvas.height = this.height;
    const from = this.photo.data;
    const image = new ImageData(this.width, this.height);
    const to = image.data;
    for (let i = 0; i < this.labels.length; i++) {
      const colour = colours[this.labels[i]];
      const at = 4 * i;
      const grey = 0.299 * from[at] + 0.587 * from[at + 1] + 0.114 * from[at + 2];
      const aside = only !== null && this.labels[i] !== only;
      const tint = aside ? 0.15 * opacity : opacity;
      for (let c = 0; c < 3; c++) {
        // Half the photo's own colour goes, else a pink mask on a green field is neither.
        let value = (1 - tint) * (0.5 * from[at + c] + 0.5 * grey) + tint * colour[c];
        if (!aside && this.line[i]) value = 255;
        else if (!aside && this.rim[i]) value = colour[c];
        to[at + c] = value; // rounds
      }
      to[at + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}
