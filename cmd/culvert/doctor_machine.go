package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
)

// machine checks this machine: caller, daemon, TUN, leftovers.
func (e *examination) machine(ctx context.Context) {
	v, err := e.client.Version(ctx)
	if e.caller == nil {
		_, err := currentCaller(e.app.name)
		e.addError("user", bad, err)
	} else if err != nil {
		e.group()
	} else {
		e.add("group", good, "", "the daemon serves you")
	}
	if err != nil {
		e.addError("daemon", bad, err)
		e.deviceFile()
		return
	}
	e.add("daemon", good, "", "culvertd %s answers (pid %d)", v.Version, v.PID)
	if v.Version == version.Version {
		e.add("version", good, "", "daemon and command line are both %s", v.Version)
	} else {
		e.add("version", warn, "sudo systemctl restart culvertd   (after installing both from one release)",
			"the daemon is %s, this program %s", v.Version, version.Version)
	}
	facts, err := e.client.Facts(ctx, nil)
	if err != nil {
		e.addError("facts", bad, err)
		e.deviceFile()
		return
	}
	e.facts = &facts
	if facts.TUN == "ok" {
		e.add("tun", good, "", "the daemon can make TUN devices")
	} else {
		e.add("tun", bad, tunFix, "%s", facts.TUN)
	}
	if facts.SessionPath != "" {
		e.add("session", good, "", "the session program is %s", facts.SessionPath)
	}
	if len(facts.Leftovers) > 0 {
		e.add("leftovers", warn, "sudo culvertd cleanup", "an earlier daemon left behind: %s", strings.Join(facts.Leftovers, "; "))
	} else {
		e.add("leftovers", good, "", "nothing is left of earlier sessions")
	}
}

const tunFix = "sudo modprobe tun; in a container: --device /dev/net/tun --cap-add NET_ADMIN"

// deviceFile is what can be told of TUN without the daemon.
func (e *examination) deviceFile() {
	if _, err := os.Stat("/dev/net/tun"); errors.Is(err, fs.ErrNotExist) {
		e.add("tun", bad, tunFix, "there is no /dev/net/tun")
		return
	}
	e.add("tun", skip, "", "/dev/net/tun exists; only the daemon can tell whether it works")
}

// group checks membership of the group that may use the daemon: that of this
// process, which is as old as the login, and that of the group file.
func (e *examination) group() {
	g, err := user.LookupGroup(api.Group)
	if err != nil {
		e.add("group", warn, "make install", "there is no group %s on this machine", api.Group)
		return
	}
	gid, _ := strconv.Atoi(g.Gid)
	ids, _ := os.Getgroups()
	if slices.Contains(ids, gid) || os.Getgid() == gid {
		e.add("group", good, "", "you are in the group %s", api.Group)
		return
	}
	if u, err := user.Current(); err == nil {
		if listed, err := u.GroupIds(); err == nil && slices.Contains(listed, g.Gid) {
			e.add("group", bad, "newgrp "+api.Group+"   (or log in again)", "you are in the group %s, but this login is older than that", api.Group)
			return
		}
	}
	e.add("group", bad, "sudo usermod -aG "+api.Group+" $USER   (then log in again)", "you are not in the group %s, so the daemon does not serve you", api.Group)
}

// network checks what the cluster's ranges and names meet on this machine.
func (e *examination) network(ctx context.Context) {
	if e.facts == nil {
		e.add("conflicts", skip, "", "not known without the daemon")
		e.add("names", skip, "", "not known without the daemon")
		return
	}
	e.conflicts(ctx)
	e.names(ctx)
}

func (e *examination) conflicts(ctx context.Context) {
	switch {
	case e.session != nil:
		e.add("conflicts", good, "", "connected: none of the %d routes collides", len(e.session.Routes))
		return
	case e.plan == nil:
		e.add("conflicts", skip, "", "the cluster's ranges are not known")
		return
	}
	facts, err := e.client.Facts(ctx, e.plan)
	if err != nil {
		e.addError("conflicts", bad, err)
		return
	}
	found := 0
	for _, c := range facts.Conflicts {
		if e.resolved(c) {
			continue
		}
		found++
		fix := c.Flag
		if fix != "" {
			fix = e.app.name + " connect " + fix
		}
		e.add("conflicts", bad, fix, "the cluster's %s collides with %s", c.Prefix, c.Local)
	}
	if found == 0 {
		e.add("conflicts", good, "", "none of the %d ranges collides with this machine's networks", len(e.plan))
	}
}

// nameTimeout bounds the look-up of a cluster name: two tries of a resolver.
const nameTimeout = 6 * time.Second

func (e *examination) names(ctx context.Context) {
	if e.session == nil {
		e.add("names", good, "", "%s will be used: %s", e.facts.DNSMode, e.facts.DNSWhy)
		return
	}
	d := e.session.DNS
	if d.Mode == "none" {
		e.add("names", warn, e.app.name+" connect --dns auto", "connected with --dns none: cluster names do not resolve here")
		return
	}
	name := "kubernetes.default.svc." + or(strings.Trim(d.ClusterDomain, "."), "cluster.local")
	ctx, cancel := context.WithTimeout(ctx, nameTimeout)
	defer cancel()
	addrs, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, name+".")
	if err != nil {
		e.add("names", bad, e.app.name+" logs; resolvectl status (or cat /etc/resolv.conf)", "%s does not resolve by %s: %v", name, d.Mode, err)
		return
	}
	e.add("names", good, "", "%s is %s (%s)", name, strings.Join(addrs, ", "), d.Mode)
}
