package main

import (
	"net/netip"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

// TestPlan: what --exclude-ips and --include-ips make of the ranges, and of the
// conflicts that the daemon sees in them.
func TestPlan(t *testing.T) {
	route := func(p string) api.Route { return api.Route{Prefix: netip.MustParsePrefix(p)} }
	e := &examination{opts: api.Options{
		ExcludeIPs: []string{"10.96.7.0/24", "fd00::/16", "db.example.com"}, IncludeIPs: []string{"192.168.4.0/24"},
	}}
	plan := e.planned([]api.Route{route("10.96.0.0/16"), route("fd00:10::/64")})
	if len(plan) != 2 || plan[0].Prefix.String() != "10.96.0.0/16" || plan[1].Source != "--include-ips" {
		t.Errorf("plan: %+v", plan)
	}
	for flag, want := range map[string]bool{
		"--exclude-ips 10.96.7.0/24":           true,
		"--exclude-ips 10.96.7.3":              true,
		"--exclude-ips 10.96.0.0/16":           false,
		"--exclude-ips 10.96.7.3,10.96.8.0/24": false,
		"--context other":                      false,
		"":                                     false,
	} {
		if got := e.resolved(api.Conflict{Flag: flag}); got != want {
			t.Errorf("resolved(%q) = %v, want %v", flag, got, want)
		}
	}
}
