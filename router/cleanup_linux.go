package router

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Cleanup removes what a culvert daemon that is no longer there left on the
// machine: rules, routes of our tables, devices named culvertN (a passed
// descriptor can make one persistent), and DNS settings. It recognises all of
// them by value and needs no memory but the saved /etc/resolv.conf; calling it
// again is harmless. The caller makes sure that no daemon runs. It returns what
// it removed, for people to read.
func Cleanup(ctx context.Context) (removed []string, err error) { return Env{}.Cleanup(ctx) }

// Leftovers lists what Cleanup would remove, and changes nothing.
func Leftovers() []string { return Env{}.Leftovers() }

// leftover is one thing to remove.
type leftover struct {
	what   string
	remove func() error
}

// Cleanup is Cleanup with the paths of e.
func (e Env) Cleanup(ctx context.Context) (removed []string, err error) {
	var errs []error
	// DNS first: a dead name server harms more than a dead route.
	switch restored, err := RestoreDNS(e); {
	case err != nil:
		errs = append(errs, err)
	case restored:
		removed = append(removed, "DNS settings in "+e.withDefaults().ResolvConf)
	}
	left, err := leftovers()
	errs = append(errs, err)
	for _, l := range left {
		if ctx.Err() != nil {
			return removed, errors.Join(append(errs, ctx.Err())...)
		}
		if err := l.remove(); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("removing %s: %w", l.what, err))
			continue
		}
		removed = append(removed, l.what)
	}
	return removed, errors.Join(errs...)
}

// Leftovers is Leftovers with the paths of e.
func (e Env) Leftovers() []string {
	var res []string
	e = e.withDefaults()
	if e.file().leftover() {
		res = append(res, "DNS settings in "+e.ResolvConf)
	}
	left, _ := leftovers() // what could be listed is better than nothing
	for _, l := range left {
		res = append(res, l.what)
	}
	return res
}

// leftovers finds rules, routes and devices, in the order in which they are to
// be removed: no rule may point into a half-empty table.
func leftovers() ([]leftover, error) {
	var left []leftover
	var errs []error
	names := map[int]string{netlink.FAMILY_V4: "IPv4", netlink.FAMILY_V6: "IPv6"}
	for _, family := range families {
		rules, err := listRules(family)
		errs = append(errs, err)
		for _, rule := range rules {
			if ourTable(rule.Table) {
				left = append(left, leftover{
					fmt.Sprintf("%s rule %d for table %d", names[family], rule.Priority, rule.Table),
					func() error { return deleteRule(rule) },
				})
			}
		}
	}
	for _, family := range families {
		routes, err := listTable(family, unix.RT_TABLE_UNSPEC)
		errs = append(errs, err)
		for _, route := range routes {
			if ourTable(route.Table) {
				left = append(left, leftover{
					fmt.Sprintf("%sroute %s of table %d", throwWord(route), prefixOf(route.Dst, family), route.Table),
					func() error { return deleteRoute(route) },
				})
			}
		}
	}
	links, err := dump(netlink.LinkList)
	if err != nil {
		errs = append(errs, fmt.Errorf("listing devices: %w", err))
	}
	for _, link := range links {
		// A bridge that somebody named so is not ours.
		if deviceName.MatchString(link.Attrs().Name) && link.Type() == "tuntap" {
			left = append(left, leftover{"device " + link.Attrs().Name, func() error { return netlink.LinkDel(link) }})
		}
	}
	return left, errors.Join(errs...)
}

func throwWord(r netlink.Route) string {
	if r.Type == unix.RTN_THROW {
		return "throw "
	}
	return ""
}
