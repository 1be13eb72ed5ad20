package main

import (
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/culvert-dev/culvert/test/cluster/internal/cable"
	"github.com/culvert-dev/culvert/test/cluster/internal/cluster"
)

func parseLink(args ...string) (func(cluster.Link) cluster.Link, error) {
	f := pflag.NewFlagSet("link", pflag.ContinueOnError)
	s := linkFlags(f)
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	changes, err := s.changes()
	return func(l cluster.Link) cluster.Link {
		for _, c := range changes {
			c(&l)
		}
		return l
	}, err
}

func TestLinkFlags(t *testing.T) {
	old := cluster.Link{Faults: cable.Faults{Delay: time.Second, Loss: 0.5}, Pods: true}
	for _, c := range []struct {
		args []string
		want cluster.Link
	}{
		{nil, old},
		{[]string{"--reset"}, cluster.Link{}},
		{[]string{"--delay", "20ms"}, cluster.Link{Faults: cable.Faults{Delay: 20 * time.Millisecond, Loss: 0.5}, Pods: true}},
		{[]string{"--loss", "0", "--pods", "off", "--rate", "1mbit"}, cluster.Link{Faults: cable.Faults{Delay: time.Second, Rate: 1e6}}},
		{[]string{"--reset", "--rate", "1mbit", "--queue", "64kb"}, cluster.Link{Faults: cable.Faults{Rate: 1e6, Queue: 64 << 10}}},
		{[]string{"--reset", "--cut", "on"}, cluster.Link{Faults: cable.Faults{Cut: true}}},
	} {
		change, err := parseLink(c.args...)
		if err != nil {
			t.Fatal(err)
		}
		if got := change(old); got != c.want {
			t.Errorf("%q: got %+v, want %+v", c.args, got, c.want)
		}
	}
	f := pflag.NewFlagSet("link", pflag.ContinueOnError)
	s := linkFlags(f)
	for in, want := range map[string]string{"cubic": "cubic", "default": ""} {
		if err := f.Parse([]string{"--congestion", in}); err != nil || s.controlOfTCP() != want {
			t.Errorf("--congestion %s: %v, %q", in, err, s.controlOfTCP())
		}
	}
	for _, bad := range [][]string{{"--cut", "maybe"}, {"--delay", "soon"}, {"--loss", "200%"}, {"--rate", "x"}} {
		if _, err := parseLink(bad...); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
