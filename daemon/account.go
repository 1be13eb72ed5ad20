package daemon

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

// account is whom a session runs as.
type account struct {
	UID, GID int
	Groups   []uint32
	Name     string // "" if the user database does not know the uid
	Home     string
	Shell    string
}

// lookup reads a user from /etc/passwd or, for users of a directory service,
// from getent(1): a static binary cannot ask NSS itself.
func lookup(uid int) (account, error) {
	file, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return account{}, fmt.Errorf("reading the user database: %w", err)
	}
	if a, ok := findUser(file, uid); ok {
		return a, nil
	}
	if out, err := run("/usr/bin/getent", "passwd", strconv.Itoa(uid)); err == nil {
		if a, ok := findUser(out, uid); ok {
			return a, nil
		}
	}
	return account{}, &api.Error{Code: api.CodeDenied, Message: fmt.Sprintf("the user database of this machine has no uid %d", uid)}
}

// findUser searches lines in the form of passwd(5).
func findUser(lines []byte, uid int) (account, bool) {
	scan := bufio.NewScanner(bytes.NewReader(lines))
	for scan.Scan() {
		f := strings.Split(scan.Text(), ":")
		if len(f) < 7 {
			continue
		}
		u, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil || int(u) != uid {
			continue
		}
		g, err := strconv.ParseUint(f[3], 10, 32)
		if err != nil {
			continue
		}
		return account{UID: uid, GID: int(g), Name: f[0], Home: f[5], Shell: f[6]}, true
	}
	return account{}, false
}

// withGroups adds the user's supplementary groups, which lookup leaves out
// because a caller's own are known from his socket.
func (a account) withGroups() (account, error) {
	u := &user.User{Uid: strconv.Itoa(a.UID), Gid: strconv.Itoa(a.GID), Username: a.Name, HomeDir: a.Home}
	ids, err := u.GroupIds()
	if out, idErr := run("/usr/bin/id", "-G", a.Name); idErr == nil {
		ids, err = strings.Fields(string(out)), nil
	}
	if err != nil {
		return a, fmt.Errorf("finding the groups of %s: %w", a.Name, err)
	}
	a.Groups = nil
	for _, id := range ids {
		g, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			return a, fmt.Errorf("finding the groups of %s: %w", a.Name, err)
		}
		a.Groups = append(a.Groups, uint32(g))
	}
	return a, nil
}

// run asks a program of the system, which may wait for a directory service.
func run(path string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + systemPath}
	return cmd.Output()
}
