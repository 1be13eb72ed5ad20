package plan

import "testing"

func TestRangesDoNotOverlap(t *testing.T) {
	var all []Ranges
	all = append(all, Home)
	for _, c := range All() {
		all = append(all, c.LAN, c.Pods, c.Services)
	}
	for i, a := range all {
		for _, b := range all[i+1:] {
			for f := range 2 {
				if a.List()[f].Overlaps(b.List()[f]) {
					t.Errorf("%s overlaps %s", a.List()[f], b.List()[f])
				}
			}
		}
	}
}

func TestAddressesLieInTheirRanges(t *testing.T) {
	for _, c := range All() {
		for f := range 2 {
			for _, a := range []Addrs{c.DNS, c.FirstSvc} {
				if !c.Services.List()[f].Contains(a.List()[f]) {
					t.Errorf("%s: %s is not in %s", c.Name, a.List()[f], c.Services)
				}
			}
			if !c.LAN.List()[f].Contains(c.Gateway.List()[f]) {
				t.Errorf("%s: gateway %s is not in %s", c.Name, c.Gateway.List()[f], c.LAN)
			}
			for _, m := range c.Machines() {
				if !c.LAN.List()[f].Contains(m.Addrs.List()[f]) {
					t.Errorf("%s %s: %s is not in %s", c.Name, m.Name, m.Addrs.List()[f], c.LAN)
				}
				if m.IsNode() && !c.Pods.List()[f].Contains(m.Pods.List()[f].Addr()) {
					t.Errorf("%s %s: %s is not in %s", c.Name, m.Name, m.Pods.List()[f], c.Pods)
				}
			}
		}
	}
}

func TestNamesAreDistinct(t *testing.T) {
	s := &Site{Prefix: "p", State: "/s"}
	seen := map[string]bool{}
	for _, c := range All() {
		for _, m := range c.Machines() {
			n := s.Namespace(c.Name, m.Name)
			if seen[n] {
				t.Errorf("namespace %s used twice", n)
			}
			seen[n] = true
		}
	}
	if got := s.Namespace("b", Laptop); got != "p-laptop" {
		t.Errorf("the laptop is shared, got %s", got)
	}
	if got := s.MachineDir("b", "node1"); got != "/s/b/node1" {
		t.Errorf("got %s", got)
	}
	if got := s.MachineDir("b", Wan); got != "/s/shared/wan" {
		t.Errorf("got %s", got)
	}
}

func TestFind(t *testing.T) {
	if _, err := Find("c"); err == nil {
		t.Error("found a cluster that is not there")
	}
	b, err := Find("b")
	if err != nil || b.Domain != "corp.internal" {
		t.Errorf("got %v, %v", b, err)
	}
}
