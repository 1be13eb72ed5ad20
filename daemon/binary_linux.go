package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/culvert-dev/culvert/daemon/api"
)

// checkBinary makes sure that only root can have written the program at path
// and returns its real path, which is what must be executed. A group that may
// write a folder above it is root's own choice (Debian's /usr/local and staff).
func checkBinary(path string) (string, error) {
	bad := func(format string, args ...any) (string, error) {
		return "", &api.Error{
			Code:    api.CodeInternal,
			Message: "the session program " + path + " may not be used: " + fmt.Sprintf(format, args...),
			Hint:    "sudo make install   installs culvert and culvertd side by side, owned by root",
		}
	}
	if !filepath.IsAbs(path) {
		return bad("its path is not absolute")
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return bad("%v", err)
	}
	st, err := os.Lstat(real)
	if err != nil {
		return bad("%v", err)
	}
	if why := onlyRoots(st); why != "" {
		return bad("%s", why)
	}
	if st.Mode().Perm()&0o111 == 0 {
		return bad("it is not executable")
	}
	for dir := filepath.Dir(real); ; dir = filepath.Dir(dir) {
		st, err := os.Lstat(dir)
		switch {
		case err != nil:
			return bad("%v", err)
		case owner(st) != 0:
			return bad("the folder %s belongs to uid %d and not to root", dir, owner(st))
		case st.Mode().Perm()&0o002 != 0 && st.Mode()&os.ModeSticky == 0:
			return bad("everybody may write the folder %s", dir)
		}
		if dir == filepath.Dir(dir) {
			return real, nil
		}
	}
}

// onlyRoots says why somebody else than root may have written a file, or "".
func onlyRoots(st os.FileInfo) string {
	switch {
	case !st.Mode().IsRegular():
		return "it is not a regular file"
	case owner(st) != 0:
		return fmt.Sprintf("it belongs to uid %d and not to root", owner(st))
	case st.Mode().Perm()&0o022 != 0:
		return fmt.Sprintf("others than root may write it (mode %v)", st.Mode().Perm())
	}
	return ""
}

func owner(st os.FileInfo) int {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(s.Uid)
	}
	return -1
}
