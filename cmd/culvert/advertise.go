package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// registry is how clients of a registry are told which address to announce.
type registry struct {
	name string
	vars func(ip netip.Addr, port uint16) []cluster.Var
}

// registries are those of docs/registries.md. Spring takes a property from the
// variable that has its name in capitals, dots as underscores and without dashes
// ("relaxed binding").
var registries = []registry{
	{"nacos", func(ip netip.Addr, port uint16) []cluster.Var {
		return pairs("SPRING_CLOUD_NACOS_DISCOVERY_IP", ip.String(), "SPRING_CLOUD_NACOS_DISCOVERY_PORT", portText(port))
	}},
	{"eureka", func(ip netip.Addr, port uint16) []cluster.Var {
		// Without an id of its own, made of the host's name by default, it would be
		// the same instance as another one on this machine.
		return pairs("EUREKA_INSTANCE_PREFERIPADDRESS", "true", "EUREKA_INSTANCE_IPADDRESS", ip.String(),
			"EUREKA_INSTANCE_NONSECUREPORT", portText(port),
			"EUREKA_INSTANCE_INSTANCEID", netip.AddrPortFrom(ip, port).String())
	}},
	{"dubbo", func(ip netip.Addr, port uint16) []cluster.Var {
		return pairs("DUBBO_IP_TO_REGISTRY", ip.String(), "DUBBO_PORT_TO_REGISTRY", portText(port))
	}},
	{"consul", func(ip netip.Addr, port uint16) []cluster.Var {
		return pairs("SPRING_CLOUD_CONSUL_DISCOVERY_PREFERIPADDRESS", "true", "SPRING_CLOUD_CONSUL_DISCOVERY_IPADDRESS", ip.String(),
			"SPRING_CLOUD_CONSUL_DISCOVERY_PORT", portText(port))
	}},
	{"zookeeper", func(ip netip.Addr, port uint16) []cluster.Var {
		// The second is what prefer-ip-address uses.
		return pairs("SPRING_CLOUD_ZOOKEEPER_DISCOVERY_INSTANCEHOST", ip.String(), "SPRING_CLOUD_ZOOKEEPER_DISCOVERY_INSTANCEIPADDRESS", ip.String(),
			"SPRING_CLOUD_ZOOKEEPER_DISCOVERY_INSTANCEPORT", portText(port))
	}},
}

func registryNames() (names []string) {
	for _, r := range registries {
		names = append(names, r.name)
	}
	return names
}

func pairs(keysAndValues ...string) (vars []cluster.Var) {
	for kv := range slices.Chunk(keysAndValues, 2) {
		vars = append(vars, cluster.Var{Name: kv[0], Value: kv[1]})
	}
	return vars
}

func portText(port uint16) string { return strconv.Itoa(int(port)) }

// printAdvertised prints the variables for one registry, or for all.
func (a *app) printAdvertised(ctx context.Context, name, format string) error {
	name, err := oneOf("--advertise", name, append(registryNames(), "all"))
	if err != nil {
		return err
	}
	intercepts, err := api.New(a.socket).Intercepts(ctx)
	if err != nil {
		return err
	}
	at, others, err := advertised(intercepts, a.context)
	if err != nil {
		return err
	}
	vars := advertisedVars(name, at)
	if a.json() {
		return a.printIndented(map[string]any{"address": at.String(), "others": others, "env": vars})
	}
	if len(others) > 0 {
		a.notice(fmt.Sprintf("it is about %s; these are exposed too: %s", at, strings.Join(others, ", ")))
	}
	return a.printVars(vars, format)
}

func advertisedVars(name string, at netip.AddrPort) (vars []cluster.Var) {
	for _, r := range registries {
		if name == r.name || name == "all" {
			vars = append(vars, r.vars(at.Addr(), at.Port())...)
		}
	}
	return vars
}

// advertised is the address of the first port that was exposed, IPv4 before
// IPv6, and all others: these variables have room for one.
func advertised(intercepts []api.Intercept, of string) (at netip.AddrPort, others []string, err error) {
	var all []netip.AddrPort
	for _, i := range intercepts {
		if i.Kind != api.KindExpose || of != "" && i.Context != of {
			continue
		}
		for _, address := range i.Addresses {
			if ap, err := netip.ParseAddrPort(address); err == nil {
				all = append(all, ap)
			}
		}
	}
	if len(all) == 0 {
		return at, nil, &api.Error{
			Code:    api.CodeNotFound,
			Message: "no port of this machine is exposed",
			Hint:    "`culvert expose 8080` exposes one on the agent's pod IP",
		}
	}
	chosen := max(0, slices.IndexFunc(all, func(ap netip.AddrPort) bool { return ap.Addr().Is4() }))
	for i, ap := range all {
		if i != chosen {
			others = append(others, ap.String())
		}
	}
	return all[chosen], others, nil
}
