package main

import (
	"image/color"
	"math"
	"os"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
)

// panel is one group of bars: a bar of each series for each label.
type panel struct {
	title  string
	unit   string
	labels []string
	series []series
	log    bool
}

type series struct {
	name   string
	values []float64 // 0: no figure
}

// colours that are told apart also without colour vision (Okabe and Ito).
var colours = []color.Color{
	color.RGBA{0, 114, 178, 255}, color.RGBA{230, 159, 0, 255}, color.RGBA{0, 158, 115, 255}, color.RGBA{204, 121, 167, 255},
}

const plotWidth, plotHeight = 16 * vg.Inch, 15 * vg.Inch

// plot draws the panels of a report that have figures into a PNG file.
func (r *report) plot(file string) error {
	panels := r.panels()
	if len(panels) == 0 {
		return nil
	}
	img := vgimg.NewWith(vgimg.UseWH(plotWidth, plotHeight), vgimg.UseDPI(80), vgimg.UseBackgroundColor(color.White))
	canvas := draw.New(img)
	height := canvas.Size().Y / vg.Length(len(panels))
	for i, p := range panels {
		drawn, err := p.draw()
		if err != nil {
			return err
		}
		top := canvas.Max.Y - vg.Length(i)*height
		drawn.Draw(draw.Crop(canvas, vg.Points(10), -vg.Points(10), top-height-canvas.Min.Y+vg.Points(8), top-canvas.Max.Y-vg.Points(8)))
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if _, err := (vgimg.PngCanvas{Canvas: img}).WriteTo(f); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func (p panel) draw() (*plot.Plot, error) {
	out := plot.New()
	out.Title.Text = p.title
	out.Y.Label.Text = p.unit
	out.Legend.Top = true
	grid := plotter.NewGrid()
	grid.Vertical.Width = 0
	out.Add(grid)
	room := (plotWidth - 2*vg.Inch) / vg.Length(len(p.labels))
	width := min(room*0.8/vg.Length(len(p.series)), vg.Points(22))
	for i, s := range p.series {
		values := make(plotter.Values, len(s.values))
		for k, v := range s.values {
			values[k] = v
			if p.log {
				values[k] = decades(v)
			}
		}
		bars, err := plotter.NewBarChart(values, width)
		if err != nil {
			return nil, err
		}
		bars.Color, bars.LineStyle.Width = colours[i%len(colours)], 0
		bars.Offset = width * (vg.Length(i) - vg.Length(len(p.series)-1)/2)
		out.Add(bars)
		out.Legend.Add(s.name, bars)
	}
	out.NominalX(p.labels...)
	out.Y.Min = 0
	if p.log {
		out.Y.Max = math.Ceil(out.Y.Max)
		out.Y.Tick.Marker = plot.TickerFunc(decadeTicks)
	} else {
		out.Y.Tick.Marker = plot.TickerFunc(evenTicks)
	}
	out.X.Min, out.X.Max = -0.5, float64(len(p.labels))-0.2 // room for the legend
	return out, nil
}

// foot is where a logarithmic axis begins: a bar has to begin somewhere.
const foot = 0.1

// decades is how many powers of ten v lies above the foot.
func decades(v float64) float64 { return math.Log10(max(v, foot) / foot) }

// evenTicks are every 500.
func evenTicks(_, most float64) []plot.Tick {
	var ticks []plot.Tick
	for v := 0.0; v <= most; v += 500 {
		ticks = append(ticks, plot.Tick{Value: v, Label: figure(v)})
	}
	return ticks
}

func decadeTicks(_, most float64) []plot.Tick {
	var ticks []plot.Tick
	for k := 0.0; k <= most; k++ {
		for _, digit := range []float64{1, 2, 5} {
			v := foot * math.Pow(10, k) * digit
			if at := decades(v); at <= most {
				ticks = append(ticks, plot.Tick{Value: at, Label: figure(v)})
			}
		}
	}
	return ticks
}

// panels chooses what the plot shows.
func (r *report) panels() []panel {
	var all []panel
	if t := r.find(carriersTable); t != nil {
		p := panel{title: "One connection, unlimited link", unit: "Mbit/s"}
		up, down := series{name: "up"}, series{name: "down"}
		for _, c := range t.Columns {
			if c == direct {
				continue // ten times the others
			}
			name := c
			if c == best || c == portForward || c == udpCarrier {
				name = "culvert " + c
			}
			p.labels = append(p.labels, name)
			u, _ := t.get(upRow, c)
			d, _ := t.get(downRow, c)
			up.values, down.values = append(up.values, u), append(down.values, d)
		}
		p.series = []series{up, down}
		all = append(all, p)
	}
	for _, congestion := range congestions {
		t := r.find(latencyTable(congestion))
		if t == nil {
			continue
		}
		p := panel{title: t.Name + ": round trip to its idle median", unit: "×", log: true}
		for _, column := range []string{best, direct} {
			for _, percentile := range []string{"p50", "p99"} {
				name := column
				if column == best {
					name = "culvert " + best
				}
				s := series{name: name + " " + percentile}
				for _, loss := range []string{"0", "1"} {
					for _, direction := range []string{"up", "down"} {
						v, _ := t.get(loss+" % loss, "+direction+": "+percentile+" to idle", column)
						s.values = append(s.values, v)
					}
				}
				p.series = append(p.series, s)
			}
		}
		p.labels = []string{"up, no loss", "down, no loss", "up, 1 % loss", "down, 1 % loss"}
		all = append(all, p)
	}
	if t := r.find(matrixTable); t != nil {
		for _, direction := range []string{"up", "down"} {
			p := panel{title: t.Name + ", " + direction, unit: "Mbit/s", log: true}
			for _, column := range []string{best, direct} {
				name := column
				if column == best {
					name = "culvert " + best
				}
				s := series{name: name}
				for _, k := range r.links() {
					v, _ := t.get(k+": "+direction, column)
					s.values = append(s.values, v)
				}
				p.series = append(p.series, s)
			}
			p.labels = r.links()
			all = append(all, p)
		}
	}
	return all
}

// links are the names of the links of the matrix that were measured.
func (r *report) links() []string {
	t := r.find(matrixTable)
	var names []string
	for _, k := range allLinks() {
		if _, ok := t.get(k.String()+": up", direct); ok {
			names = append(names, k.String())
		}
	}
	return names
}
