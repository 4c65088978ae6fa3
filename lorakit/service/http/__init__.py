from lorakit.extras import check_extra

check_extra("serve", "lorakit serve")
