package main

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
)

// caller is the user for whom a session runs: who runs the command, or who ran
// sudo to run it.
type caller struct {
	uid, gid int
	groups   []uint32 // supplementary; only for a caller behind sudo
	home     string
	env      []string // of the session
	sudo     bool     // this process is root and acts for uid
}

// currentCaller is the caller of this process. Root alone is refused: a session
// runs code of the kubeconfig's choosing, and never as root.
func currentCaller(name string) (*caller, error) {
	return callerOf(os.Getuid(), os.Environ(), name, user.LookupId)
}

func callerOf(uid int, environ []string, name string, lookup func(string) (*user.User, error)) (*caller, error) {
	env := environment(environ)
	if uid != 0 {
		return &caller{uid: uid, gid: os.Getgid(), home: env.get("HOME"), env: environ}, nil
	}
	sudoUID, err := strconv.Atoi(env.get("SUDO_UID"))
	if err != nil || sudoUID == 0 {
		return nil, &api.Error{
			Code:    api.CodeDenied,
			Message: "a session runs as an ordinary user, and this is root",
			Hint: fmt.Sprintf("run `%s connect` as yourself, a member of the group culvert (`usermod -aG culvert USER` adds one, and takes effect at the next login), or `sudo %s connect` from your own login",
				name, name),
		}
	}
	u, err := lookup(strconv.Itoa(sudoUID))
	if err != nil {
		return nil, &api.Error{
			Code:    api.CodeDenied,
			Message: fmt.Sprintf("the user behind sudo (SUDO_UID %d) is not in the password database: %v", sudoUID, err),
			Hint:    "run `" + name + " connect` without sudo, as a member of the group culvert",
		}
	}
	c := &caller{uid: sudoUID, home: u.HomeDir, sudo: true}
	if c.gid, err = strconv.Atoi(u.Gid); err != nil {
		return nil, fmt.Errorf("group of user %s: %w", u.Username, err)
	}
	ids, err := u.GroupIds()
	if err != nil {
		ids = []string{u.Gid}
	}
	for _, id := range ids {
		if gid, err := strconv.ParseUint(id, 10, 32); err == nil {
			c.groups = append(c.groups, uint32(gid))
		}
	}
	c.env = env.forUser(u)
	return c, nil
}

// environment is a list of NAME=value, as os.Environ returns it.
type environment []string

// get returns the last value of a name, which is the one that counts.
func (e environment) get(name string) string {
	for _, kv := range slices.Backward(e) {
		if value, ok := strings.CutPrefix(kv, name+"="); ok {
			return value
		}
	}
	return ""
}

// forUser is root's environment made u's: what leads to root's files is replaced
// or left out, the rest (proxies, locale, a KUBECONFIG that sudo -E kept) stays.
func (e environment) forUser(u *user.User) []string {
	rootHome := e.get("HOME")
	out := []string{"HOME=" + u.HomeDir, "USER=" + u.Username, "LOGNAME=" + u.Username}
	for _, kv := range e {
		name, value, _ := strings.Cut(kv, "=")
		switch {
		case name == "HOME", name == "USER", name == "LOGNAME", name == "MAIL", name == "SHELL":
		case strings.HasPrefix(name, "SUDO_"), strings.HasPrefix(name, "XDG_"):
		case name == "KUBECONFIG" && rootHome != u.HomeDir && within(rootHome, value):
		default:
			out = append(out, kv)
		}
	}
	return out
}

// within says whether a path, or one of a list of paths, lies below dir.
func within(dir, list string) bool {
	if dir == "" || dir == "/" {
		return false
	}
	for _, p := range filepath.SplitList(list) {
		if p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/") {
			return true
		}
	}
	return false
}
