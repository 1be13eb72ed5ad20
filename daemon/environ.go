package daemon

import (
	"fmt"
	"slices"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
)

// systemPath is PATH where no user's environment is known.
const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// maxEnv bounds a session's environment, in bytes; execve(2) would refuse more
// with a less useful error.
const maxEnv = 256 << 10

// dropped variables say how the caller's programs are to be loaded, or belong
// to the service that the caller was, and have no place in the session.
func dropped(name string) bool {
	switch name {
	case "GODEBUG", "GOTRACEBACK", "GOGC", "GOMAXPROCS", "GOMEMLIMIT", "GOCOVERDIR",
		"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID",
		"BASH_ENV", "ENV", "GCONV_PATH":
		return true
	}
	return strings.HasPrefix(name, "LD_") || strings.HasPrefix(name, "BASH_FUNC_") || strings.HasPrefix(name, "MALLOC_")
}

// callerEnv is the environment of a session that its user asked for himself.
func callerEnv(env []string) ([]string, error) {
	var out []string
	size := 0
	for _, kv := range env {
		name, _, ok := strings.Cut(kv, "=")
		if !ok || name == "" || strings.ContainsRune(kv, 0) {
			return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%.64q in the environment is not NAME=VALUE", kv)}
		}
		if size += len(kv) + 1; size > maxEnv {
			return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("the environment is longer than %d bytes", maxEnv)}
		}
		if !dropped(name) {
			out = append(out, kv)
		}
	}
	return out, nil
}

// sudoEnv is the environment of a session that root asked for on behalf of a:
// what it says of root's own login is replaced.
func sudoEnv(env []string, a account) ([]string, error) {
	env, err := callerEnv(env)
	if err != nil {
		return nil, err
	}
	env = slices.DeleteFunc(env, func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		switch name {
		case "HOME", "USER", "LOGNAME", "SHELL", "MAIL", "DBUS_SESSION_BUS_ADDRESS":
			return true
		}
		return strings.HasPrefix(name, "SUDO_") || strings.HasPrefix(name, "XDG_")
	})
	return append(env, loginEnv(a)...), nil
}

// bootEnv is all that a session at boot gets.
func bootEnv(a account) []string { return append(loginEnv(a), "PATH="+systemPath) }

func loginEnv(a account) []string {
	return []string{"HOME=" + a.Home, "USER=" + a.Name, "LOGNAME=" + a.Name, "SHELL=" + a.Shell}
}
