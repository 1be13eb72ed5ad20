package main

import (
	"errors"
	"os/user"
	"reflect"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

func lookup(uid string) (*user.User, error) {
	if uid != "1000" {
		return nil, user.UnknownUserIdError(4)
	}
	return &user.User{Uid: "1000", Gid: "1001", Username: "jane", HomeDir: "/home/jane"}, nil
}

func TestCaller(t *testing.T) {
	for _, c := range []struct {
		uid  int
		env  []string
		want int
		sudo bool
		code string
	}{
		{uid: 1000, want: 1000},
		{uid: 1000, env: []string{"SUDO_UID=7"}, want: 1000}, // says nothing: this is no root
		{uid: 0, env: []string{"SUDO_UID=1000"}, want: 1000, sudo: true},
		{uid: 0, code: api.CodeDenied},
		{uid: 0, env: []string{"SUDO_UID=0"}, code: api.CodeDenied},
		{uid: 0, env: []string{"SUDO_UID=x"}, code: api.CodeDenied},
		{uid: 0, env: []string{"SUDO_UID=4"}, code: api.CodeDenied},
	} {
		got, err := callerOf(c.uid, c.env, "culvert", lookup)
		var e *api.Error
		switch {
		case c.code != "":
			if !errors.As(err, &e) || e.Code != c.code || !strings.Contains(e.Hint, "culvert connect") {
				t.Errorf("uid %d %v: error %v", c.uid, c.env, err)
			}
		case err != nil || got.uid != c.want || got.sudo != c.sudo:
			t.Errorf("uid %d %v: %+v, %v", c.uid, c.env, got, err)
		}
	}
}

func TestEnvironmentForUser(t *testing.T) {
	jane, _ := lookup("1000")
	common := []string{"HOME=/home/jane", "USER=jane", "LOGNAME=jane"}
	for _, c := range []struct{ in, want []string }{
		{[]string{"HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/zsh", "MAIL=/var/mail/root", "SUDO_UID=1000", "XDG_CONFIG_HOME=/root/.config", "HTTPS_PROXY=http://p", "LANG=C"},
			[]string{"HTTPS_PROXY=http://p", "LANG=C"}},
		{[]string{"HOME=/root", "KUBECONFIG=/root/.kube/config"}, nil},
		{[]string{"HOME=/root", "KUBECONFIG=/home/jane/a:/root/b"}, nil},
		{[]string{"HOME=/root", "KUBECONFIG=/home/jane/a:/rooted"}, []string{"KUBECONFIG=/home/jane/a:/rooted"}},
		{[]string{"HOME=/home/jane", "KUBECONFIG=/home/jane/a"}, []string{"KUBECONFIG=/home/jane/a"}}, // sudo -E
	} {
		if got, want := environment(c.in).forUser(jane), append(common[:3:3], c.want...); !reflect.DeepEqual(got, want) {
			t.Errorf("%v: %v, want %v", c.in, got, want)
		}
	}
}
