package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/culvert-dev/culvert/test/cluster/internal/cable"
	"github.com/culvert-dev/culvert/test/cluster/internal/cluster"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

func linkCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "link", Short: "Show or change the laptop's link to the world, while it is in use", Args: cobra.NoArgs,
	}
	flags := linkFlags(cmd.Flags())
	cmd.RunE = o.run(func(s *cluster.Site, _ *plan.Cluster, _ []string) error {
		changes, err := flags.changes()
		if err != nil {
			return err
		}
		l, err := s.Link()
		if len(changes) > 0 {
			l, err = s.SetLink(func(l *cluster.Link) {
				for _, change := range changes {
					change(l)
				}
			})
		}
		if err == nil && flags.set.Changed("congestion") {
			err = s.Congestion(flags.controlOfTCP())
		}
		if err != nil {
			return err
		}
		fmt.Fprintln(s.Out, l)
		return nil
	})
	return cmd
}

// linkSetting is the flags of the command link.
type linkSetting struct {
	set                                 *pflag.FlagSet
	delay, loss, rate, queue, pods, cut string
	congestion                          string
	reset                               bool
}

func linkFlags(f *pflag.FlagSet) *linkSetting {
	s := &linkSetting{set: f}
	f.StringVar(&s.delay, "delay", "", "one-way delay, like 20ms")
	f.StringVar(&s.loss, "loss", "", "share of lost frames, like 1%")
	f.StringVar(&s.rate, "rate", "", "limit each way, like 100mbit; 0 lifts it")
	f.StringVar(&s.queue, "queue", "", "what may wait for a limited rate, each way, like 256kb; 0: 100 ms of the rate")
	f.StringVar(&s.cut, "cut", "", "on: nothing passes, as if unplugged; off")
	f.StringVar(&s.pods, "pods", "", "on: the laptop reaches pods, nodes and node ports directly; off")
	f.StringVar(&s.congestion, "congestion", "", "congestion control of TCP on laptop, machines and present pods, like cubic or bbr, by their routes; default: the kernel's own")
	f.BoolVar(&s.reset, "reset", false, "a perfect cable, pods off")
	return s
}

// changes turns the flags that were given into changes of the link, --reset first.
func (s *linkSetting) changes() ([]func(*cluster.Link), error) {
	var all []func(*cluster.Link)
	if s.reset {
		all = append(all, func(l *cluster.Link) { *l = cluster.Link{} })
	}
	for _, f := range []struct {
		name  string
		parse func() (func(*cluster.Link), error)
	}{
		{"delay", func() (func(*cluster.Link), error) {
			v, err := cable.ParseDelay(s.delay)
			return func(l *cluster.Link) { l.Delay = v }, err
		}},
		{"loss", func() (func(*cluster.Link), error) {
			v, err := cable.ParseLoss(s.loss)
			return func(l *cluster.Link) { l.Loss = v }, err
		}},
		{"rate", func() (func(*cluster.Link), error) {
			v, err := cable.ParseRate(s.rate)
			return func(l *cluster.Link) { l.Rate = v }, err
		}},
		{"queue", func() (func(*cluster.Link), error) {
			v, err := cable.ParseQueue(s.queue)
			return func(l *cluster.Link) { l.Queue = v }, err
		}},
		{"cut", func() (func(*cluster.Link), error) {
			v, err := onOff(s.cut)
			return func(l *cluster.Link) { l.Cut = v }, err
		}},
		{"pods", func() (func(*cluster.Link), error) {
			v, err := onOff(s.pods)
			return func(l *cluster.Link) { l.Pods = v }, err
		}},
	} {
		if !s.set.Changed(f.name) {
			continue
		}
		change, err := f.parse()
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", f.name, err)
		}
		all = append(all, change)
	}
	return all, nil
}

// controlOfTCP is the value of --congestion in the kernel's words.
func (s *linkSetting) controlOfTCP() string {
	if s.congestion == "default" {
		return ""
	}
	return s.congestion
}

func onOff(s string) (bool, error) {
	switch s {
	case "on":
		return true, nil
	case "off":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither on nor off", s)
}
